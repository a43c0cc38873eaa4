"""What methods share: matching, clustering, greedy choice, scores, budgets over views, frames and sequences."""
