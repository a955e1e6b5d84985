// TLS for block protocols, over memory: records in, records out.
