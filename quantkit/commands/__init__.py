"""One file per verb: `add` describes its arguments, `run` does it. Importing them costs nothing heavy."""
