"""Side-by-side measurements. From the repository's root: python -m bench.tokenize"""
