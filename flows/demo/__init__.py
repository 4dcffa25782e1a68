"""The demo: customer tickets of a small shop, five kinds of LLM calls, one shared router."""
