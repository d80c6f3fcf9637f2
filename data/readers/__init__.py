"""Rows, dialogs, questions and answers out of files of any usual shape."""
