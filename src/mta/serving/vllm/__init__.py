"""The vLLM engine: adapters made on demand, one server process."""
