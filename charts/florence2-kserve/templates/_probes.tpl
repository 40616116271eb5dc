{{/* Ports, probes and the end of a pod, as each mode allows them. All take root and part.
   Probe ports are numbers: Knative declares only one port, and keeps a probe's own only where it is one. */}}

{{- define "florence2.ports" -}}
{{- $ports := list (dict "name" "http1" "containerPort" 8080 "protocol" "TCP") (dict "name" "h2c" "containerPort" 8081 "protocol" "TCP") -}}
{{- if eq (include "florence2.firstPort" .) "grpc" -}}
{{- $ports = reverse $ports -}}
{{- end -}}
{{- if include "florence2.knative" .root -}}
{{- $ports = slice $ports 0 1 -}}
{{- end -}}
{{/* In Standard mode KServe's Service has the first one on port 80, which is where callers look for it. */}}
{{- toYaml $ports -}}
{{- end -}}

{{- define "florence2.probes" -}}
{{- $probes := (index .root.Values .part).probes -}}
{{- $ready := printf "/v2/models/%s/ready" .root.Values.modelName -}}
startupProbe:
  httpGet:
    path: {{ $ready }}
    port: 8080
  periodSeconds: 1
  timeoutSeconds: 5
  failureThreshold: {{ $probes.startupSeconds }}
readinessProbe:
  httpGet:
    path: {{ $ready }}
    port: 8080
  {{- if include "florence2.knative" .root }}
  successThreshold: 1 # no period: the queue-proxy looks many times a second until it is ready
  {{- else }}
  periodSeconds: {{ $probes.readinessPeriodSeconds }}
  timeoutSeconds: 5
  failureThreshold: 3
  {{- end }}
livenessProbe:
  {{- if and (include "florence2.knative" .root) (eq (include "florence2.firstPort" .) "grpc") }}
  grpc: # Knative would send an httpGet to this component's gRPC port
    port: 8081
    service: liveness
  {{- else }}
  httpGet:
    path: /v2/health/live
    port: 8080
  {{- end }}
  periodSeconds: {{ $probes.livenessPeriodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ $probes.livenessFailureThreshold }}
{{- end -}}

{{/* Seconds that a pod may need for its end after SIGTERM. */}}
{{- define "florence2.drainSeconds" -}}
{{- $settings := include "florence2.settings" . | fromYaml -}}
{{ add (ceil $settings.drain_seconds) $settings.grace_period }}
{{- end -}}

{{- define "florence2.terminationGracePeriodSeconds" -}}
{{- $given := .root.Values.standard.terminationGracePeriodSeconds -}}
{{- if kindIs "invalid" $given -}}
{{ add .root.Values.standard.preStopSeconds (include "florence2.drainSeconds" . | int) 5 }}
{{- else -}}
{{ $given }}
{{- end -}}
{{- end -}}
