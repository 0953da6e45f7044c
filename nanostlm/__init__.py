"""What the scripts at the top level share: read model.py and train.py first."""
