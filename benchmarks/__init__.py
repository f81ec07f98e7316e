"""What benchmark.py measures, and the notes and results of former runs."""
