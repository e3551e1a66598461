"""Jastrzebski et al. (2020): the break-even point on optimization trajectories.

arXiv 2002.09572. Abstract and numbers of a review version were available; what a small
net must show was found by trying, and is said by mark.
"""
