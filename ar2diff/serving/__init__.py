"""A server with OpenAI's interface: an engine that batches rows, HTTP around it, and a page."""
