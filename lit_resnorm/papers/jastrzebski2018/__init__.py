"""Jastrzebski et al. (2018): residual connections and iterative inference."""
