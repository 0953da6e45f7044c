"""Modules shared by the top-level scripts. Read model.py and train.py first."""
