"""Comparisons of quantkit with its peers on the same data in the same run; see README.md."""
