// Nodes, edges, roles, permissions, drain, transactions.
