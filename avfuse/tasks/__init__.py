"""Downstream tasks (paper Sec. 4), each a head, a loss, a metric and a program; the loop is shared."""
