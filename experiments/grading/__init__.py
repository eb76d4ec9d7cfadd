"""Grades completions; ``grader.Grader`` is the entry."""
