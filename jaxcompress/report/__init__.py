"""What was done to a model, for people to read: tables, plots, latency, and one HTML page.

Tables need nothing beyond the core; plots and the page need the extra `report`. Whatever is drawn
is also written as JSON.
"""

from typing import TYPE_CHECKING

from jaxcompress import lazy
from jaxcompress.report._latency import Latency as Latency
from jaxcompress.report._latency import latency as latency
from jaxcompress.report._leaves import Leaf as Leaf
from jaxcompress.report._leaves import Leaves as Leaves
from jaxcompress.report._leaves import leaves as leaves
from jaxcompress.report._page import Section as Section
from jaxcompress.report._page import page as page
from jaxcompress.report._plot import Plot as Plot
from jaxcompress.report._plots import Point as Point
from jaxcompress.report._plots import plot_curves as plot_curves
from jaxcompress.report._plots import plot_leaves as plot_leaves
from jaxcompress.report._plots import plot_tradeoff as plot_tradeoff
from jaxcompress.report._table import Column as Column
from jaxcompress.report._table import Table as Table
from jaxcompress.report._table import table as table
from jaxcompress.report._units import BYTES as BYTES
from jaxcompress.report._units import MILLISECONDS as MILLISECONDS
from jaxcompress.report._units import PERCENT as PERCENT
from jaxcompress.report._units import SECONDS as SECONDS
from jaxcompress.report._units import Unit as Unit

if TYPE_CHECKING:
    from jaxcompress.report._graph_plot import plot_graph as plot_graph
    from jaxcompress.report._group_plot import plot_group as plot_group
else:
    __getattr__, __dir__ = lazy.attach(
        __name__, names={"_graph_plot": ["plot_graph"], "_group_plot": ["plot_group"]}
    )
