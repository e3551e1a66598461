"""Signal and noise by depth, on any network (Labatie 2019, arXiv 1811.03087)."""

from lit_resnorm.measures.moments.pathology import Verdict, pathology, spine
from lit_resnorm.measures.moments.profile import DepthProfile, SiteMoments
from lit_resnorm.measures.moments.propagation import Propagation, propagate
from lit_resnorm.measures.moments.recorder import NoiseSums
from lit_resnorm.measures.moments.signal_and_noise import (
    flow_between_sites,
    measured_sites,
    signal_and_noise,
)
from lit_resnorm.measures.moments.sums import ChannelMoments, ChannelSums

__all__ = [
    "ChannelMoments",
    "ChannelSums",
    "DepthProfile",
    "NoiseSums",
    "Propagation",
    "SiteMoments",
    "Verdict",
    "flow_between_sites",
    "measured_sites",
    "pathology",
    "propagate",
    "signal_and_noise",
    "spine",
]
