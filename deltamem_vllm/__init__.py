"""δ-mem inside vLLM: its models with a memory as a plugin, and our server with vLLM as its engine.

Needs vLLM 0.32 (the extra ``vllm``), in an environment of its own; the rest of the project does without. What is
imported of vLLM is public where there is a public way; the connector, the metadata's builder and the table of model
configurations aren't, so one minor version is pinned.
"""
