def write_report(run):
    (run / "index.html").write_text("")
