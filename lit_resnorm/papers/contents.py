"""What is said of each item before it is loaded, in the order of the papers."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

__all__ = ["ENTRIES", "Entry", "said_of"]

FURUSHO2020 = "Furusho & Ikeda (2020), APSIPA Trans. Signal Inf. Process. 9, e9"
FURUSHO_SEP = "Furusho & Ikeda (2019), ACML, PMLR 101:94-108"
JASTRZEBSKI2020 = "Jastrzebski et al. (2020), ICLR, arXiv 2002.09572"
LABATIE2019 = "Labatie (2019), ICML, arXiv 1811.03087"
JASTRZEBSKI2018 = "Jastrzebski et al. (2018), ICLR, arXiv 1710.04773"
ARPIT2019 = "Arpit & Bengio (2019), arXiv 1901.03611"


class Entry(NamedTuple):
    """What `Item` says, and the module in `papers` that defines the item."""

    name: str
    title: str
    source: str
    mark: str
    module: str


class _ItemEntry(TypedDict):
    name: str
    title: str
    source: str
    mark: str


_ENTRIES = (
    Entry(
        "furusho2020.fig1",
        "Algorithmic stability, where leave-one-out is exact (concept)",
        f"{FURUSHO2020}, Figure 1 (caption)",
        "A",
        "furusho2020.fig1",
    ),
    Entry(
        "furusho2020.fig2",
        "Gradient, excess loss and distance under the PL inequality (concept)",
        f"{FURUSHO2020}, Figure 2 (caption)",
        "A",
        "furusho2020.fig2",
    ),
    Entry(
        "furusho2020.table1",
        "PL constants of the three linear nets bound the PL ratio along training",
        f"{FURUSHO2020}, Table 1 (caption)",
        "A",
        "furusho2020.table1",
    ),
    Entry(
        "furusho2020.fig3",
        "PL constant of deep linear nets by variant and gain",
        f"{FURUSHO2020}, Figure 3 (caption), and Theorem of section III (abstract)",
        "A",
        "furusho2020.fig3",
    ),
    Entry(
        "furusho2020.table2",
        "Excess loss of the three linear nets after a fixed budget",
        f"{FURUSHO2020}, Table 2 (caption)",
        "A",
        "furusho2020.table2",
    ),
    Entry(
        "furusho2020.fig4",
        "Training and test loss of ten-layer nets with and without skips",
        f"{FURUSHO2020}, Figure 4 (caption)",
        "A",
        "furusho2020.fig4",
    ),
    Entry(
        "furusho2020.fig5",
        "Stability of ten-layer nets with and without skips",
        f"{FURUSHO2020}, Figure 5 (caption);"
        " Furusho et al. (2019), INNS BDDL (abstract)",
        "A",
        "furusho2020.fig5",
    ),
    Entry(
        "furusho2020.fig6",
        "Activation rate of each hidden layer before and after training",
        f"{FURUSHO2020}, Figure 6 (caption)",
        "A",
        "furusho2020.fig6",
    ),
    Entry(
        "furusho2020.fig7",
        "Fisher eigenvalues by depth: flat, exponential, sub-linear",
        f"{FURUSHO2020}, Figure 7 and section IV (abstract and caption)",
        "A",
        "furusho2020.fig7",
    ),
    Entry(
        "furusho2020.fig8",
        "Final loss over depth and learning rate, with the bound 2 / lambda_max",
        f"{FURUSHO2020}, Figure 8 (caption)",
        "A",
        "furusho2020.fig8",
    ),
    Entry(
        "furusho2020.fig9",
        "Loss of four-layer nets over seeds, each at its own learning rate",
        f"{FURUSHO2020}, Figure 9 (caption)",
        "A",
        "furusho2020.fig9",
    ),
    Entry(
        "furusho_sep.angles",
        "Angles shrink most in MLPs and least with batch norm",
        f"{FURUSHO_SEP}, Theorems 1 to 3 and figures",
        "P",
        "furusho_sep.angles",
    ),
    Entry(
        "furusho_sep.coactivation",
        "Two examples activate the same units the more, the smaller their angle",
        f"{FURUSHO_SEP}, section 3",
        "P",
        "furusho_sep.coactivation",
    ),
    Entry(
        "furusho_sep.distance_ratio",
        "Skips and batch norm raise the distance ratio; error falls with it",
        f"{FURUSHO_SEP}, section 4 and experiments",
        "P",
        "furusho_sep.distance_ratio",
    ),
    Entry(
        "labatie2019.fig2",
        "Powers of signal and noise spread with depth in nets without norms",
        f"{LABATIE2019}, Figure 2 and stored histograms",
        "P",
        "labatie2019.fig2",
    ),
    Entry(
        "labatie2019.fig3",
        "Effective rank and growth of the sensitivity tend to 1 without norms",
        f"{LABATIE2019}, Figure 3 and stored data",
        "P",
        "labatie2019.fig3",
    ),
    Entry(
        "labatie2019.fig4",
        "The sensitivity grows exponentially in feed-forward nets with batch norm",
        f"{LABATIE2019}, Figure 4 and stored data",
        "P",
        "labatie2019.fig4",
    ),
    Entry(
        "labatie2019.fig5",
        "The sensitivity is a power of depth in ResNets with batch norm",
        f"{LABATIE2019}, Figure 5 and stored data",
        "P",
        "labatie2019.fig5",
    ),
    Entry(
        "labatie2019.fig3_conv",
        "Convolutional nets without norms collapse too",
        f"{LABATIE2019}, Figure 3",
        "P",
        "labatie2019.convolutional",
    ),
    Entry(
        "labatie2019.fig4_conv",
        "Convolutional nets with batch norm: exponential growth, fat tails",
        f"{LABATIE2019}, Figure 4 and stored data",
        "P",
        "labatie2019.convolutional",
    ),
    Entry(
        "labatie2019.fig5_conv",
        "Convolutional ResNets with batch norm: a power of depth",
        f"{LABATIE2019}, Figure 5 (values read off)",
        "P",
        "labatie2019.convolutional",
    ),
    Entry(
        "labatie2019.nobn",
        "Without norms a ResNet collapses: rank to 1, branch share to 1/2",
        f"{LABATIE2019}; author's article (mentioned, without data)",
        "P",
        "labatie2019.nobn",
    ),
    Entry(
        "jastrzebski2018.cosine",
        "Trained blocks move the state down the loss",
        f"{JASTRZEBSKI2018} (a review version)",
        "P",
        "jastrzebski2018.blocks",
    ),
    Entry(
        "jastrzebski2018.ratio",
        "The first blocks change the state most",
        f"{JASTRZEBSKI2018} (a review version)",
        "P",
        "jastrzebski2018.blocks",
    ),
    Entry(
        "jastrzebski2018.readout",
        "Accuracy of early read-outs rises gradually with depth",
        f"{JASTRZEBSKI2018} (a review version)",
        "P",
        "jastrzebski2018.blocks",
    ),
    Entry(
        "jastrzebski2018.drop",
        "Accuracy hardly falls without one of the upper blocks",
        f"{JASTRZEBSKI2018} (a review version)",
        "D",
        "jastrzebski2018.blocks",
    ),
    Entry(
        "jastrzebski2018.sharing",
        "Sharing blocks explodes at initialisation unless batch norms are unshared",
        f"{JASTRZEBSKI2018} (a review version)",
        "P",
        "jastrzebski2018.sharing",
    ),
    Entry(
        "jastrzebski2018.unrolling",
        "Repeating the last block, scaled, lowers the loss",
        f"{JASTRZEBSKI2018} (a review version)",
        "P",
        "jastrzebski2018.unrolling",
    ),
    Entry(
        "arpit2019.hidden",
        "He's weights keep the norm of the input in every hidden state",
        f"{ARPIT2019} (abstract)",
        "A",
        "arpit2019.norms",
    ),
    Entry(
        "arpit2019.gradient",
        "He's weights keep the norm of the error in every layer's gradient",
        f"{ARPIT2019} (abstract)",
        "A",
        "arpit2019.norms",
    ),
    Entry(
        "jastrzebski2020.break_even",
        "Curvature grows until the steps no longer bear it, by learning rate",
        f"{JASTRZEBSKI2020}, abstract",
        "A",
        "jastrzebski2020.break_even",
    ),
    Entry(
        "jastrzebski2020.noise",
        "Larger rates lead to less gradient noise, better conditioned",
        f"{JASTRZEBSKI2020}, abstract and numbers of a review version",
        "A",
        "jastrzebski2020.noise",
    ),
)
ENTRIES = {entry.name: entry for entry in _ENTRIES}


def said_of(name: str) -> _ItemEntry:
    """Return an entry as the arguments of its `Item`."""
    entry = ENTRIES[name]
    return _ItemEntry(
        name=entry.name, title=entry.title, source=entry.source, mark=entry.mark
    )
