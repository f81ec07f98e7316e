"""Tables, figures and pages about finished runs: what report.py and its --compare are made of."""
