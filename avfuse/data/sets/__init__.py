"""The public data sets, one file each, in the layouts of their own releases."""
