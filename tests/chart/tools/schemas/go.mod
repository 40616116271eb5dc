// Modules that carry the schemas of what the chart makes; only their files are used (schemas.py).
module florence2.invalid/chartschemas

go 1.26.0

require (
	github.com/kedacore/keda/v2 v2.21.0
	github.com/kserve/kserve v0.20.0
	github.com/prometheus-operator/prometheus-operator v0.85.0
	k8s.io/kubernetes v1.34.4
	knative.dev/serving v0.48.1
	sigs.k8s.io/gateway-api v1.5.1
)
