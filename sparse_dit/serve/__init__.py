"""A server for generations: the HTTP API, the durable queue, and the workers that hold pipelines."""
