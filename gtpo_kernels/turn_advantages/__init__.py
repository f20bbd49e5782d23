"""Turn rewards to returns, to advantages within a group, to one advantage per token by turn id."""
