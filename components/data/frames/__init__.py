"""The tables that the rules judge. What no single row shows (a day's volume, an item that is known) is a column here.

rows     events, items and quarantined rows, one row each
days     the newest days, and each figure of a day beside its usual value
columns  one row a feature: how many values it has, and how well it predicts the label
vectors  item vectors one by one, and those of new items beside those of older items
"""
