"""How a service in a cluster scales while it is asked: samples, pods' ways to their first answer, findings."""
