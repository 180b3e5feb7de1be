"""What tests share: ranks on gloo, small models and corpora, clusters, injected faults."""
