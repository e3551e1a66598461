"""Signal and noise by depth, on any network (Labatie 2019, arXiv 1811.03087)."""

from lit_resnorm.measures.moments.flow import Flow
from lit_resnorm.measures.moments.profile import (
    flow_between_sites,
    measured_sites,
    signal_and_noise,
)
from lit_resnorm.measures.moments.recorder import NoiseSums
from lit_resnorm.measures.moments.records import DepthProfile, SiteMoments
from lit_resnorm.measures.moments.statistics import (
    absolute_moment,
    branch_share,
    central_moment,
    effective_rank,
    identity_deviation,
    raw_moment,
)
from lit_resnorm.measures.moments.sums import ChannelMoments, ChannelSums

__all__ = [
    "ChannelMoments",
    "ChannelSums",
    "DepthProfile",
    "Flow",
    "NoiseSums",
    "SiteMoments",
    "absolute_moment",
    "branch_share",
    "central_moment",
    "effective_rank",
    "flow_between_sites",
    "identity_deviation",
    "measured_sites",
    "raw_moment",
    "signal_and_noise",
]
