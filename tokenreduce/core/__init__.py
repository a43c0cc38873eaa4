"""What a decision about tokens is: plans, evidence, reducers, budgets, traces. It knows torch and nothing above it."""

# With any of them comes the registry, which tells reducers how classes are found by their names.
from tokenreduce.core import registry as registry
