"""The engine `vllm`: a teacher that vLLM runs, of which nothing is believed that was not compared."""
