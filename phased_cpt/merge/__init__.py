"""The merged model: base and adapters become one plain folder, a tensor at a time. This room loads torch."""
