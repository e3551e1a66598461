"""Members of one variant, trained together."""

from lit_resnorm.population.module import Population

__all__ = ["Population"]
