{{/* Who decides on the number of replicas, by what. All take root and part. */}}

{{- define "florence2.scaler" -}}
{{- $class := (index .root.Values .part).autoscaling.class -}}
{{- if $class -}}
{{ $class }}
{{- else if include "florence2.knative" .root -}}
kpa
{{- else -}}
{{ ternary "hpa" "none" (eq .part "transformer") }}
{{- end -}}
{{- end -}}

{{/* Fields of a component. */}}
{{- define "florence2.scaling" -}}
{{- $scaling := (index .root.Values .part).autoscaling -}}
{{- $class := include "florence2.scaler" . -}}
minReplicas: {{ $scaling.minReplicas }}
{{- if and (has $class (list "kpa" "hpa" "keda")) $scaling.maxReplicas }}
maxReplicas: {{ $scaling.maxReplicas }}
{{- end }}
{{- if eq $class "kpa" }}
scaleMetric: {{ $scaling.kpa.metric }}
scaleTarget: {{ $scaling.kpa.target }}
{{- else if and (eq $class "hpa") (not (include "florence2.knative" .root)) }}
scaleMetric: cpu
scaleTarget: {{ $scaling.hpa.targetCPUUtilizationPercentage }}
{{- else if eq $class "keda" }}
autoScaling:
  metrics:
    - type: External
      external:
        metric:
          backend: prometheus
          serverAddress: {{ $scaling.keda.serverAddress }}
          query: {{ $scaling.keda.query | default (include "florence2.queueDepth" .root) | quote }}
        target:
          type: Value
          value: {{ include "florence2.scalar" $scaling.keda.threshold | quote }}
        {{- with $scaling.keda.authenticationRef }}
        authenticationRef:
          authenticationRef:
            name: {{ . }}
          {{- with $scaling.keda.authModes }}
          authModes: {{ . }}
          {{- end }}
        {{- end }}
  {{- $up := $scaling.keda.scaleUpStabilizationWindowSeconds }}
  {{- $down := $scaling.keda.scaleDownStabilizationWindowSeconds }}
  {{- if or (ne nil $up) (ne nil $down) }}
  behavior:
    {{- if ne nil $up }}
    scaleUp:
      stabilizationWindowSeconds: {{ $up }}
    {{- end }}
    {{- if ne nil $down }}
    scaleDown:
      stabilizationWindowSeconds: {{ $down }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Requests that the engines have taken in and not yet answered. Takes the root. */}}
{{- define "florence2.queueDepth" -}}
{{- $pods := printf `namespace="%s",pod=~"%s-predictor-.*"` .Release.Namespace (include "florence2.name" .) -}}
{{ printf `sum(florence2_engine_requests_waiting{%s}) + sum(florence2_engine_requests_running{%s})` $pods $pods }}
{{- end -}}

{{/* Annotations of a component's pods. */}}
{{- define "florence2.scalingAnnotations" -}}
{{- $scaling := (index .root.Values .part).autoscaling -}}
{{- $class := include "florence2.scaler" . -}}
{{- if not (include "florence2.knative" .root) }}
serving.kserve.io/autoscalerClass: {{ $class }}
{{- else if eq $class "hpa" }}
autoscaling.knative.dev/class: hpa.autoscaling.knative.dev
autoscaling.knative.dev/metric: cpu
autoscaling.knative.dev/target: {{ $scaling.hpa.targetCPUUtilizationPercentage | quote }}
{{- else }}
{{- $keys := dict
  "targetUtilizationPercentage" "target-utilization-percentage"
  "window" "window"
  "panicWindowPercentage" "panic-window-percentage"
  "panicThresholdPercentage" "panic-threshold-percentage"
  "targetBurstCapacity" "target-burst-capacity"
  "scaleToZeroPodRetentionPeriod" "scale-to-zero-pod-retention-period"
  "initialScale" "initial-scale"
  "activationScale" "activation-scale"
  "scaleDownDelay" "scale-down-delay"
}}
{{- range $name, $key := $keys }}
{{- $value := index $scaling.kpa $name }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
autoscaling.knative.dev/{{ $key }}: {{ include "florence2.scalar" $value | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
