{{/* Whether the load test may read the log of Knative's autoscaler, which alone says when it panics. Takes the root. */}}
{{- define "florence2.loadtestReadsAutoscalerLog" -}}
{{- $loadtest := .Values.loadtest -}}
{{- if and $loadtest.enabled (eq $loadtest.command "autoscale") (include "florence2.knative" .) $loadtest.autoscalerLog.read -}}
yes
{{- end -}}
{{- end -}}
