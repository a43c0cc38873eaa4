"""What a decision about tokens is: plans, evidence, reducers, budgets, traces. It knows torch and nothing above it."""
