"""What is measured, against whom: see run.py."""
