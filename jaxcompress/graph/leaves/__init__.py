"""Special leaves: params held in parts, which fn is run on without making their arrays.

`run_leaves` runs fn on params with leaves of one `LeafKind`, such as quantized or factorised ones.
"""

from jaxcompress.graph.leaves._carrier import Converted as Converted
from jaxcompress.graph.leaves._carrier import LeafKind as LeafKind
from jaxcompress.graph.leaves._carrier import LeafRun as LeafRun
from jaxcompress.graph.leaves._carrier import LeafUse as LeafUse
from jaxcompress.graph.leaves._carrier import SiteResult as SiteResult
from jaxcompress.graph.leaves._carrier import SiteRule as SiteRule
from jaxcompress.graph.leaves._carrier import list_uses as list_uses
from jaxcompress.graph.leaves._carrier import run_leaves as run_leaves
from jaxcompress.graph.leaves._parted import Parted as Parted
from jaxcompress.graph.leaves._parted import part_shardings as part_shardings
from jaxcompress.graph.leaves._parted import place_parts as place_parts
from jaxcompress.graph.leaves._parted import place_result as place_result
