"""`python -m tools.family`: train the bundled models that draw what they are asked for, from seeds alone."""
