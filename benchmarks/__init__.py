"""Commands that measure: each prints a table and writes JSON."""
