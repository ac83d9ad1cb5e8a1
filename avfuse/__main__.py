"""All commands under one name: `avfuse COMMAND ...`, or `python -m avfuse COMMAND ...`."""

import runpy
import sys
from difflib import get_close_matches

from . import process

COMMANDS = {  # the module that `python -m` runs, too
    "train": ("avfuse.train", "pretrain a masked autoencoder on any folder of videos"),
    "classify": ("avfuse.tasks.classify", "fine-tune or probe a classifier of clips"),
    "segment": ("avfuse.tasks.segment", "train to mark the pixels that sound"),
    "localize": ("avfuse.tasks.localize", "train to point at what sounds"),
    "separate": ("avfuse.tasks.separate", "train to take the sound of what is seen out of a mixture"),
    "retrieve": ("avfuse.tasks.retrieve", "nearest clips by an encoder's features, and their recall"),
    "predict": ("avfuse.predict", "what a trained model says of videos"),
    "features": ("avfuse.features", "features of a folder of videos in one file"),
    "data": ("avfuse.data", "check a data folder, or pack it into shards"),
    "shapes": ("avfuse.data.sounding_shapes", "write the embedded data set, Sounding Shapes"),
    "demo": ("avfuse.demo", "a page to click: what models see, hear and say"),
    "report": ("avfuse.report", "the index.html of a run"),
}


def main() -> int | str:
    """Runs the command that is named, or says which there are."""
    process.end_at_once()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        process.called = f"avfuse {name}"
        del sys.argv[1]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    if name in ("-h", "--help"):
        process.end_with_its_reader(True)
        lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
        print("usage: avfuse COMMAND [OPTIONS]\n", *lines, "\navfuse COMMAND --help says more.", sep="\n")
        return 0
    meant = get_close_matches(name, COMMANDS)
    hint = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(COMMANDS)}"
    return f"error: no command {name!r}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
