"""What `make docs` asks of mkdocs: the pages of the repository as they stand, and nothing undocumented."""

import logging
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "docs/*.png", "benchmarks/*.md", "kernels/README.md")
LINKED = ("constraints*.txt", "setup.py", "avfuse/fusion.py", "benchmarks/results/tasks/*.json", "LICENSE")
FROM_ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")

warn = logging.getLogger("mkdocs.hooks").warning  # an error, as the build is strict


def on_files(files, config):
    """Every page at its path in the repository, so that links between pages hold here as they do there."""
    for file in list(files.documentation_pages()) + list(files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted(path for pattern in PAGES + LINKED for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))


def on_pre_build(config):
    """A public name needs a docstring, and so do the functions of a class, or those that they override."""
    package = griffe.load("avfuse", search_paths=[ROOT], try_relative_path=False)
    for name in package.exports:
        public = package[name]
        if not public.has_docstring:
            warn("%s has no docstring", public.path)
        for call in public.functions.values() if public.is_class else ():
            homes = [kind.functions.get(call.name) for kind in (public, *public.mro())]
            if not call.name.startswith("_") and not any(home and home.has_docstring for home in homes):
                warn("%s has no docstring", call.path)


def on_post_page(output, page, config):
    for tag in FROM_ELSEWHERE.findall(output):
        warn("%s loads from elsewhere: %s", page.file.src_uri, tag)
