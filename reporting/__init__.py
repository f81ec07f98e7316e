"""Tables, figures and pages about finished runs and checkpoints, for report.py."""
