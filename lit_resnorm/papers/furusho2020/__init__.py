"""Furusho & Ikeda (2020): skip connections and batch normalisation, in theory.

APSIPA Transactions on Signal and Information Processing 9, e9,
doi 10.1017/ATSIP.2020.7. Abstract and captions were available, not the text: the
analysis is derived anew, and what a figure must show is said by mark.
"""
