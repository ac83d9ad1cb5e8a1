"""Ops: one file each, of the same name as its kernel. The only code that knows which backend runs."""
