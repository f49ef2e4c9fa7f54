"""One module a model family, one row a class.

What is really different in a family, such as where its positions come from, is a small function above its row.
"""
