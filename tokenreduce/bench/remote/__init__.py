"""Questions to a server that speaks OpenAI's protocol, in place of a model in this process."""
