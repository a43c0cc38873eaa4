"""Plans: which of N tokens become which of K tokens; one kind per file."""

from tokenreduce.core.plan.base import Plan
from tokenreduce.core.plan.chain import Chain
from tokenreduce.core.plan.identity import Identity
from tokenreduce.core.plan.merge import Merge
from tokenreduce.core.plan.mix import Mix
from tokenreduce.core.plan.pool import Pool
from tokenreduce.core.plan.prune import Prune
from tokenreduce.core.plan.rebuild import Rebuild
from tokenreduce.core.plan.rows import take

__all__ = ["Chain", "Identity", "Merge", "Mix", "Plan", "Pool", "Prune", "Rebuild", "take"]
