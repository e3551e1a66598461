"""Signal and noise by depth, on any network (Labatie 2019, arXiv 1811.03087)."""

from lit_resnorm.measures.copies.side_by_side import side_by_side
from lit_resnorm.measures.moments.pathology import Verdict, pathology, spine
from lit_resnorm.measures.moments.profile import DepthProfile, SiteMoments
from lit_resnorm.measures.moments.propagation import Propagation, propagate
from lit_resnorm.measures.moments.recorder import NoiseSums
from lit_resnorm.measures.moments.signal_and_noise import (
    flow_between_sites,
    measured_sites,
    signal_and_noise,
)
from lit_resnorm.measures.moments.statistics import (
    absolute_moment,
    branch_share,
    central_moment,
    effective_rank,
    identity_deviation,
    raw_moment,
)
from lit_resnorm.measures.moments.sums import ChannelMoments, ChannelSums
from lit_resnorm.measures.passes.flow import Flow

__all__ = [
    "ChannelMoments",
    "ChannelSums",
    "DepthProfile",
    "Flow",
    "NoiseSums",
    "Propagation",
    "SiteMoments",
    "Verdict",
    "absolute_moment",
    "branch_share",
    "central_moment",
    "effective_rank",
    "flow_between_sites",
    "identity_deviation",
    "measured_sites",
    "pathology",
    "propagate",
    "raw_moment",
    "side_by_side",
    "signal_and_noise",
    "spine",
]
