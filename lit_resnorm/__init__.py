"""What skip connections and normalisation do to the training of deep networks."""
