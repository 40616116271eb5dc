{{/* Names and labels. */}}

{{/* Name of the InferenceService, from which KServe and this chart derive all others. */}}
{{- define "florence2.name" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end -}}

{{/* What stays the same from version to version: on the InferenceService anything else would roll out new pods. */}}
{{- define "florence2.stableLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of all other objects. */}}
{{- define "florence2.labels" -}}
{{ include "florence2.stableLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Labels that KServe gives a component's pods in both modes. Takes root and part. */}}
{{- define "florence2.podSelector" -}}
serving.kserve.io/inferenceservice: {{ include "florence2.name" .root }}
component: {{ .part }}
{{- end -}}

{{- define "florence2.headlessName" -}}
{{ include "florence2.name" . }}-predictor-headless
{{- end -}}

{{- define "florence2.testName" -}}
{{ include "florence2.name" . }}-test
{{- end -}}

{{- define "florence2.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "florence2.name" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* Takes root and part. */}}
{{- define "florence2.image" -}}
{{- $image := (index .root.Values .part).image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* "true" in Knative mode, empty in Standard mode. */}}
{{- define "florence2.knative" -}}
{{- if eq .Values.mode "Knative" }}true{{ end -}}
{{- end -}}

{{/* "grpc" or "rest": what a component's first port speaks. Takes root and part. */}}
{{- define "florence2.firstPort" -}}
{{- if eq .part "predictor" -}}
grpc
{{- else if include "florence2.knative" .root -}}
{{ .root.Values.transformer.protocol }}
{{- else -}}
rest
{{- end -}}
{{- end -}}
