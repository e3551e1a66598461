"""What every probe shares: when it measures, on what, on which ranks, and for whom."""
