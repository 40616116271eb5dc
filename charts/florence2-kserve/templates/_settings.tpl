{{/* The package's settings, as the environment variables that it reads. */}}

{{/* A scalar as text. YAML's integers reach templates as floats, whose own text would be 6.7e+07. */}}
{{- define "florence2.scalar" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}
{{ printf "%.0f" . }}
{{- else -}}
{{ toString . }}
{{- end -}}
{{- end -}}

{{/* Bounds that both components have: the transformer refuses by them before it asks the predictor. */}}
{{- define "florence2.sharedBounds" -}}
max_rows max_num_beams max_new_tokens
{{- end -}}

{{/* A component's settings: what the chart derives, under what the values say. Takes root and part; gives YAML. */}}
{{- define "florence2.settings" -}}
{{- $values := index .root.Values .part -}}
{{- $model := .root.Values.model -}}
{{- $derived := dict "request_timeout_seconds" $values.timeoutSeconds -}}
{{- $_ := set $derived "grace_period" (sub $values.timeoutSeconds (ceil $values.settings.drain_seconds) | max 0) -}}
{{- if eq .part "transformer" -}}
{{- $_ := set $derived "predictor_request_timeout_seconds" .root.Values.predictor.timeoutSeconds -}}
{{- range splitList " " (include "florence2.sharedBounds" .) -}}
{{- $bound := index $.root.Values.predictor.settings . -}}
{{- if $bound -}}
{{- $_ := set $derived . $bound -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- $_ := set $derived "device" (ternary "cuda" "cpu" $values.gpu.enabled) -}}
{{- end -}}
{{- if eq $model.source "hub" -}}
{{- $_ := set $derived "model" $model.hubId -}}
{{- if $model.revision -}}
{{- $_ := set $derived "model_revision" $model.revision -}}
{{- end -}}
{{- else if eq $model.source "storage" -}}
{{- $_ := set $derived "model" "/mnt/models" -}}
{{- else -}}
{{- $_ := set $derived "model" "embedded" -}}
{{- end -}}
{{- range $name, $value := $values.settings -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $derived $name $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $derived -}}
{{- end -}}

{{/* Number of torch's threads: the CPU limit, rounded up. Takes a quantity such as 2, "2" or "1500m". */}}
{{- define "florence2.threads" -}}
{{- $text := include "florence2.scalar" . -}}
{{- if hasSuffix "m" $text -}}
{{ divf (trimSuffix "m" $text | float64) 1000 | ceil | int }}
{{- else -}}
{{ float64 $text | ceil | int }}
{{- end -}}
{{- end -}}

{{/* Environment of a component. Takes root and part. */}}
{{- define "florence2.env" -}}
{{- $root := .root -}}
{{- $values := index .root.Values .part -}}
{{- $model := .root.Values.model -}}
{{- range $name, $value := include "florence2.settings" . | fromYaml }}
- name: FLORENCE2_{{ upper $name }}
  value: {{ include "florence2.scalar" $value | quote }}
{{- end }}
{{- if eq $model.source "storage" }}
- name: STORAGE_URI
  value: {{ include "florence2.storageUri" . | quote }}
{{- end }}
{{- if ne $model.source "hub" }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- else if $model.tokenSecret.name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ $model.tokenSecret.name }}
      key: {{ $model.tokenSecret.key }}
{{- end }}
{{- $own := list -}}
{{- range $values.extraEnv }}{{- $own = append $own .name -}}{{- end }}
{{- $cpu := dig "limits" "cpu" "" $values.resources }}
{{- if and (eq .part "predictor") $cpu (not (has "OMP_NUM_THREADS" $own)) }}
- name: OMP_NUM_THREADS # torch would take all of the node's cores
  value: {{ include "florence2.threads" $cpu | quote }}
{{- end }}
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where KServe fetches a component's files. Takes root and part. */}}
{{- define "florence2.storageUri" -}}
{{- $model := .root.Values.model -}}
{{- if eq .part "predictor" -}}
{{ $model.storageUri }}
{{- else -}}
{{ $model.processorUri | default $model.storageUri }}
{{- end -}}
{{- end -}}
